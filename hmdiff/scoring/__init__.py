"""Named protocols: what is compared with what, and the numbers of one or several processes."""

"""Files: locations of shipped files, atomic writing, and safe reading of untrusted files."""

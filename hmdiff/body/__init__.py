"""The body: skinning, its files, joints and keypoints, the coarse mesh and its upsampling."""

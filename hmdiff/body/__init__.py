"""The body model: skinning, file formats, joints and keypoints, the coarse mesh and its upsampling."""

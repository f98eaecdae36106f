"""Readers of clips, a module a source: video (MP4), frames (folders, PNG), events (npy, npz, DSEC HDF5), safe_npy (untrusted npy)."""

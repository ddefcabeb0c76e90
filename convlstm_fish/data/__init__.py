"""Recordings and what is cut from them: the frame store, decoding, labels, clips; DataModules in ``modules``."""

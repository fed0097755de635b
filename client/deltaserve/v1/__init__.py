"""Generated from proto/deltaserve/v1 by proto/generate.py."""

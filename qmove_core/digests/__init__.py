"""Digests of bytes, computed where the bytes lie."""

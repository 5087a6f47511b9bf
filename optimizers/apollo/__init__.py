"""APOLLO and APOLLO-Mini."""

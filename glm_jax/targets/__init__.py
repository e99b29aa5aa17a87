"""Machines to plan and compile for: a description of each for XLA, and its peak rates.

Knows no model. The *.txtpb files are what XLA reads in place of a device that is not there.
"""

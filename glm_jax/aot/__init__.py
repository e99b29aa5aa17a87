"""Ahead of time: plan, check and compile the steps for machines that are not there."""

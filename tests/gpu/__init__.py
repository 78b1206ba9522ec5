"""Tests of what runs on GPUs."""

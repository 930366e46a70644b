"""Tests of what a person runs: the command line, run directories, data, evaluation."""

"""Operators: one signature each, several backends."""

"""Softmax attention: its op and implementations."""

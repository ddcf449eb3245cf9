"""Conversion of published PyTorch checkpoints to this project's parameter trees and back."""

"""The toy laboratory: a symbolic language, tiny models trained on it in seconds, attacks on them, and the demo.

Everything here runs offline on a CPU. Attacked weights exist in memory only and are never written.
"""

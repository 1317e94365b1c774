"""Hostile files for everything that reads a file: `python tests/fuzz_campaign.py --cases 10000`, and a small run in tests/test_fuzz.py."""

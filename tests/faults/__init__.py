"""Kills, full disks and other faults of a machine, injected into real runs: `python tests/fault_campaign.py --moments 200`."""

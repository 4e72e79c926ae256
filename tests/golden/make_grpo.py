"""Make grpo.npz: what TRL's own code gives for the cases of tests/grpo_cases.py.

    python tests/golden/make_grpo.py

The committed file is from TRL 1.16.0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpo_cases
import grpo_judge

if __name__ == "__main__":
    grpo_cases.write_golden(grpo_judge.results())

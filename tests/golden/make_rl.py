"""Make grpo.npz and dpo.npz: what TRL's own code gives for the cases of tests/grpo_cases.py and tests/dpo_cases.py.

    python tests/golden/make_rl.py

The committed files are from TRL 1.16.0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dpo_judge
import golden_numbers
import grpo_judge

if __name__ == "__main__":
    golden_numbers.write("grpo", grpo_judge.results())
    golden_numbers.write("dpo", dpo_judge.results())

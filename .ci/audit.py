"""Known vulnerabilities of the pinned packages, by pip-audit: exit 1 if there are any.  Without an answer it says so.

python .ci/audit.py [CONSTRAINTS]
"""

import json
import subprocess
import sys
from pathlib import Path

SECONDS = 120
ROOT = Path(__file__).parents[1]


def told(output: str) -> tuple[int, str]:
    """The exit code, and what to say of pip-audit's JSON.

    >>> told('{"dependencies": [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "none"}]}')
    (0, 'audit: 1 of 2 pinned packages have no known vulnerability; of the others the index knows nothing')
    >>> told('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}]}')
    (1, 'audit: a 1 has X-1, mended in 2; raise the pin')
    """
    packages = json.loads(output)["dependencies"]
    found = [(package, flaw) for package in packages for flaw in package.get("vulns", [])]
    if found:
        lines = [
            f"audit: {package['name']} {package['version']} has {flaw['id']}, mended in "
            f"{', '.join(flaw['fix_versions']) or 'no version yet'}; raise the pin"
            for package, flaw in found
        ]
        return 1, "\n".join(lines)
    known = sum("vulns" in package for package in packages)
    rest = "" if known == len(packages) else "; of the others the index knows nothing"
    return 0, f"audit: {known} of {len(packages)} pinned packages have no known vulnerability{rest}"


def main() -> int:
    pins = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "constraints.txt")
    command = [sys.executable, "-m", "pip_audit", "--requirement", pins, "--no-deps", "--disable-pip"]
    quiet = ["--format", "json", "--progress-spinner", "off", "--timeout", "5"]
    try:
        done = subprocess.run([*command, *quiet], capture_output=True, text=True, timeout=SECONDS)
        code, text = told(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        code, text = 0, "audit: no answer from the package index, so that nothing was audited"
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())

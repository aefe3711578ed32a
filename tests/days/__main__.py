"""Live days by their numbers, or freeze fifty: python -m days NUMBER … | --freeze, with src and tests on the path."""

import sys

from days.day import day
from days.frozen import freeze, lived

if sys.argv[1:2] == ["--freeze"]:
    freeze()
for number in map(int, [] if "--freeze" in sys.argv else sys.argv[1:]):
    print(f"day {number}: {day(number)}")
    seen = lived(day(number))
    print("\n".join(f"  broken: {law}" for law in seen.broken) or "  every law holds")
    print("".join(f"  without skill: {law}\n" for law in seen.unlucky), end="")

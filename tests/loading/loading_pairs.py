"""Instructions and responses."""

PAIRS = [{"instruction": f"{n}+{n}=", "response": str(2 * n)} for n in range(48)]

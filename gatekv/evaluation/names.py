"""What the names of policies in a table stand for; records say it to those who do not know the policies."""

from gatekv.policies import REMAINDERS, SCORERS, Policy, resolve
from gatekv.policies.amount import Amount

UNTRAINED, TRAINED = "untrained", "trained"
FULL = ("full", 1.0)


def is_control(name: str) -> bool:
    """Whether a name like "untrained_alone+global" asks for a gate's policy under random weights."""
    return name.startswith(UNTRAINED) and name.partition("+")[0] not in SCORERS  # one's own may begin so


def resolved(name: str, budget: Amount | None) -> Policy:
    """As `gatekv.policies.resolve`, to which the untrained control is a gate."""
    return resolve("gate" + name.removeprefix(UNTRAINED) if is_control(name) else name, budget)


def without_maps(name: str) -> str:
    """The name without a remainder that needs low-rank maps: LESS's control at the same bytes."""
    return "+".join(p for p in name.split("+") if not (p in REMAINDERS and REMAINDERS[p].maps))


def told(name: str, policy: Policy) -> dict:
    """What a record says of its policy: {"gate": whose gate judged, TRAINED, UNTRAINED or None; "maps": bool}."""
    gate = None if not policy.needs.gate else UNTRAINED if is_control(name) else TRAINED
    return {"gate": gate, "maps": policy.needs.maps}


def gate_by_name(name: str) -> str | None:
    """Whose gate judges under a policy of that name, which need not be registered here: it may be an older one."""
    if is_control(name):
        return UNTRAINED
    scorer = SCORERS.get(name.partition("+")[0])
    return TRAINED if (name.startswith("gate") if scorer is None else scorer.gate) else None


def gate_of(line: dict) -> str | None:
    """Whose gate judged in a record, or row of results.json; older ones say it by the policy's name alone."""
    return line["gate"] if "gate" in line else gate_by_name(line["policy"])


def learned(line: dict) -> bool:
    """Whether a trained gate or trained maps had a part in a record, or row of results.json."""
    maps = line["maps"] if "maps" in line else "less" in line["policy"].split("+")
    return gate_of(line) == TRAINED or maps

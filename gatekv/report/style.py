"""How a policy is drawn, in pictures and page alike: colour and marker say the scorer, dashes the budget rule."""

from gatekv.evaluation.names import TRAINED, gate_by_name

# Pairs: on light ground, on dark ground. Trained gates are the subject, so blue is theirs alone; controls step back.
# The others keep apart under red-green blindness by lightness and, where that is not enough, by marker.
BLUE, PALE, GREY, BLACK = ("#1f5fbf", "#7db3ff"), ("#5f7fae", "#93a9cc"), ("#767676", "#9c9c9c"), ("#111111", "#eeeeee")
COLORS = [
    ("#d55e00", "#ff8a3d"),
    ("#00795a", "#2fc79b"),
    ("#a0398f", "#e28ad4"),
    ("#b07a00", "#f0b93a"),
    ("#7a1f4b", "#e0719f"),
    ("#6b4226", "#c99a76"),
    ("#6b6b00", "#c5c552"),
    ("#c2495c", "#ff9aa8"),
]
MARKERS = "osD^vPX"
DASHES = {"": [], "uniform": [], "threshold": [], "ada": [5, 2], "global": [7, 2, 1.5, 2], "decay": [3, 2]}
DASHES |= {"pyramid": [2, 2], "think": [1, 1.5], "qaq": [3, 1, 1, 1], "ada+pyramid": [5, 1, 1, 1]}
OTHER_RULE = [4, 1, 1, 1, 1, 1]
CONTROLS = ("random", "sinks_recent", "value_norm")
KINDS = ("full", "learned", "free", "control", "untrained")


def kind(policy: str) -> str:
    """Which of KINDS a policy's name belongs to: "gate+global" is learned, "snapkv" is free (of training)."""
    scorer, gate = policy.split("+")[0], gate_by_name(policy)
    if gate is not None:
        return "learned" if gate == TRAINED else "untrained"
    return "full" if scorer == "full" else "control" if scorer in CONTROLS else "free"


def measure(row: dict) -> str:
    """Name of the field that is drawn for a row of results.json: "kl" for ppl (lower is better), else "score"."""
    return "kl" if row["task"] == "ppl" else "score"


def styles(policies: list[str]) -> dict[str, dict]:
    """A style per policy, sorted by kind.

    Each has kind, color (light and dark ground), marker (one of MARKERS), dash (on and off, in points) and width.
    Scorers take colours in the order given, so the same list gives the same picture.
    """
    out = {}
    for group in KINDS:
        names = [p for p in dict.fromkeys(policies) if kind(p) == group]
        scorers = list(dict.fromkeys(p.split("+")[0] for p in names))
        for i, name in enumerate(names):
            scorer, _, rule = name.partition("+")
            turn = scorers.index(scorer)
            style = {"kind": group, "marker": MARKERS[turn % len(MARKERS)], "dash": DASHES.get(rule, OTHER_RULE)}
            if group == "learned":  # one colour for all, so the marker tells the rules apart
                style |= {"color": BLUE, "width": 2.6, "marker": MARKERS[i % len(MARKERS)]}
            elif group == "untrained":
                style |= {"color": PALE, "width": 1.6, "dash": [1, 2], "marker": MARKERS[i % len(MARKERS)]}
            elif group == "control":
                style |= {"color": GREY, "width": 1.3}
            else:
                style |= {"color": BLACK if group == "full" else COLORS[turn % len(COLORS)], "width": 1.7}
            out[name] = style
    return out

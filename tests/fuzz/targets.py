"""Every target by its name."""

from __future__ import annotations

from tests.fuzz import announcements, answers, cluster, configuration, connections, messages, requests
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (announcements, answers, cluster, configuration, connections, messages, requests)
    for target in module.TARGETS
}

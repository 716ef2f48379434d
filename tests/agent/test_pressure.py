"""What a machine gives of itself: the decisions, what the system says, and looking again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.scenes import until
from worker_agent.pressure import Judge, Pressure, PressurePolicy, Share
from worker_agent.sensors import (
    Readings,
    Sensors,
    Zone,
    degrees_left,
    own_group,
    parse_memory_level,
    parse_speed_limit,
    parse_stalled,
    parse_thermal_level,
    throttled_share,
)

POLICY = PressurePolicy()
WELL = Readings()


def judged(*readings: Readings, seconds_between: float = 5.0) -> Share:
    judge, share = Judge(POLICY), Share()
    for number, each in enumerate(readings):
        share = judge.judge(each, number * seconds_between)
    return share


# What follows from one look ...


@pytest.mark.parametrize(
    ("readings", "slots_of_8", "detail"),
    [
        (WELL, 8, ""),
        (Readings(battery_percent=43), 8, ""),
        (Readings(battery_percent=5), 8, ""),
        (Readings(on_battery=True, battery_percent=43), 4, "on battery (43 %): half of its slots"),
        (Readings(on_battery=True), 4, "on battery: half of its slots"),
        (Readings(on_battery=True, battery_percent=19), 1, "on battery (19 %): one request at a time"),
        (Readings(degrees_left=-0.5), 4, "hot: half of its slots"),
        (Readings(degrees_left=3), 8, ""),
        (Readings(throttled_share=0.5), 4, "hot: half of its slots"),
        (Readings(speed_percent=64), 4, "hot: half of its slots"),
        (Readings(thermal_level=1), 8, ""),
        (Readings(thermal_level=2), 4, "hot: half of its slots"),
        (Readings(stalled_percent=12), 4, "short of memory: half of its slots"),
        (Readings(stalled_percent=60), 1, "short of memory: one request at a time"),
        (Readings(available_share=0.02), 4, "short of memory: half of its slots"),
        (Readings(memory_level=1), 8, ""),
        (Readings(memory_level=2), 4, "short of memory: half of its slots"),
        (Readings(memory_level=4), 1, "short of memory: one request at a time"),
        (
            Readings(on_battery=True, battery_percent=15, thermal_level=3),
            1,
            "on battery (15 %) and hot: one request at a time",
        ),
    ],
)
def test_a_machine_gives_what_its_owner_can_spare(readings: Readings, slots_of_8: int, detail: str) -> None:
    share = judged(readings)
    assert (share.slots(8), share.detail) == (slots_of_8, detail)


def test_only_an_almost_empty_battery_lets_the_machine_sleep_while_it_serves() -> None:
    assert judged(Readings(on_battery=True, battery_percent=19)).saving
    assert not judged(Readings(on_battery=True, battery_percent=43)).saving
    assert not judged(Readings(battery_percent=5)).saving


# ... and from several.


def test_a_value_between_the_two_limits_keeps_what_was() -> None:
    cool, warm, hot = Readings(degrees_left=20), Readings(degrees_left=3), Readings(degrees_left=-1)
    assert judged(cool, warm).factor == 1
    assert judged(hot, *[warm] * 100).factor == 0.5


def test_a_reason_is_dropped_only_after_a_calm_time() -> None:
    hot = Readings(thermal_level=3)
    assert judged(hot, WELL, WELL, WELL).factor == 0.5
    assert judged(hot, *[WELL] * 7).factor == 1


def test_a_plug_that_was_put_in_is_believed_after_the_calm_time_and_told_at_once() -> None:
    empty, plugged = Readings(on_battery=True, battery_percent=10), Readings(battery_percent=11)
    share = judged(empty, plugged)
    assert share.detail == "on battery until a moment ago: one request at a time"
    assert not share.saving
    assert judged(empty, *[plugged] * 7) == Share()


def test_a_sensor_that_falls_silent_is_no_reason_for_long() -> None:
    assert judged(Readings(stalled_percent=90), *[WELL] * 7) == Share()


some_readings = st.builds(
    Readings,
    on_battery=st.booleans(),
    battery_percent=st.none() | st.floats(0, 100),
    speed_percent=st.none() | st.floats(0, 100),
    thermal_level=st.none() | st.integers(0, 4),
    degrees_left=st.none() | st.floats(-50, 100),
    throttled_share=st.none() | st.floats(0, 1),
    stalled_percent=st.none() | st.floats(0, 100),
    memory_level=st.sampled_from([None, 1, 2, 4]),
    available_share=st.none() | st.floats(0, 1),
)


@given(st.lists(some_readings, min_size=1, max_size=20), st.integers(1, 4096))
def test_whatever_happens_a_slot_is_left_and_a_reason_is_given(history: list[Readings], slots: int) -> None:
    share = judged(*history)
    assert 0 < share.factor <= 1
    assert 1 <= share.slots(slots) <= slots
    assert (share.factor < 1) == bool(share.detail)
    assert share.slots(slots) == slots or share.detail


@given(st.lists(some_readings, max_size=20))
def test_whatever_happened_all_is_given_again_after_a_calm_time(history: list[Readings]) -> None:
    assert judged(*history, WELL, *[WELL] * 7) == Share()


@given(st.lists(some_readings, min_size=20, max_size=60))
def test_a_reason_stays_for_the_calm_time_so_it_cannot_flap(history: list[Readings]) -> None:
    judge = Judge(POLICY)
    shares = [judge.judge(readings, float(second)) for second, readings in enumerate(history)]
    hot = ["hot" in share.reasons for share in shares]
    runs = "".join("x" if each else " " for each in hot).split()
    whole = runs[:-1] if hot[-1] else runs
    assert all(len(run) >= POLICY.calm_seconds for run in whole)


# What the system says ...

PMSET_INTEL = """Note: No thermal warning level has been recorded
2026-01-05 10:20:30 +0100 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= 64
"""
PMSET_APPLE_SILICON = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded
"""
PSI = """some avg10=12.34 avg60=3.00 avg300=0.50 total=123456
full avg10=99.00 avg60=0.00 avg300=0.00 total=99
"""


def test_what_macs_say_is_read() -> None:
    assert parse_speed_limit(PMSET_INTEL) == 64
    assert parse_speed_limit(PMSET_APPLE_SILICON) is None
    assert parse_thermal_level("com.apple.system.thermalpressurelevel 2\n") == 2
    assert parse_thermal_level("com.apple.system.thermalpressurelevel: Failed\n") is None
    assert [parse_memory_level(text) for text in ("1\n", "4\n", "", "7", "sysctl: unknown oid")] == [
        *(1, 4, None, None, None)
    ]


def test_what_linux_says_is_read() -> None:
    assert parse_stalled(PSI) == 12.34
    assert parse_stalled("") is None
    assert own_group("4:memory:/old\n0::/user.slice/agent.service\n") == "/user.slice/agent.service"
    assert own_group("4:memory:/old\n") is None
    assert own_group("0::/../outside\n") is None
    assert throttled_share(1000, 3500, 5.0) == 0.5
    assert throttled_share(3500, 1000, 5.0) is None
    assert throttled_share(0, 10_000_000, 5.0) == 1.0


def test_the_hottest_zone_of_what_computes_counts() -> None:
    processor = Zone("cpu-thermal", 78_000, (("passive", 85_000), ("critical", 110_000)))
    placeholder = Zone("acpitz", 90_000, (("passive", 0), ("hot", -274_000), ("critical", 119_000)))
    alarms = Zone("x86_pkg_temp", 90_000, (("passive", 60_000),))
    wireless = Zone("iwlwifi_1", 90_000, (("passive", 60_000),))
    fan = Zone("cpu-thermal", 78_000, (("active", 50_000),))
    assert degrees_left([processor, placeholder, alarms, wireless, fan]) == 7
    assert degrees_left([alarms, wireless, fan]) is None


@given(st.text(max_size=200))
def test_no_text_breaks_a_parser(text: str) -> None:
    for parse in (parse_speed_limit, parse_thermal_level, parse_memory_level, parse_stalled, own_group):
        parse(text)


# ... and where it says it.


def system_of(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_linux_laptop_is_read_from_its_files(tmp_path: Path) -> None:
    throttled = "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_total_time_ms"
    zone = "sys/class/thermal/thermal_zone0"
    root = system_of(
        tmp_path,
        {
            f"{zone}/type": "acpitz\n",
            f"{zone}/temp": "97000\n",
            f"{zone}/trip_point_0_type": "passive\n",
            f"{zone}/trip_point_0_temp": "95000\n",
            "sys/class/thermal/thermal_zone1/type": "cpu_off\n",
            throttled: "1000\n",
            "proc/pressure/memory": PSI,
            "proc/self/cgroup": "0::/agent\n",
            "sys/fs/cgroup/agent/memory.pressure": PSI.replace("12.34", "56.78"),
        },
    )
    clock: Iterator[float] = iter([0.0, 10.0])
    sensors = Sensors(system="Linux", root=root, clock=lambda: next(clock))
    first = sensors.read()
    assert (first.degrees_left, first.throttled_share, first.stalled_percent) == (-2, None, 56.78)
    system_of(tmp_path, {throttled: "6000\n"})
    assert sensors.read().throttled_share == 0.5


def test_a_machine_without_any_sensor_gives_all_it_has(tmp_path: Path) -> None:
    readings = Sensors(system="Linux", root=tmp_path).read()
    assert (readings.degrees_left, readings.throttled_share, readings.stalled_percent) == (None, None, None)


def test_a_mac_is_asked_by_its_own_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "pmset": PMSET_INTEL,
        "notifyutil": "com.apple.system.thermalpressurelevel 3\n",
        "sysctl": "2\n",
    }
    for name, answer in answers.items():
        (tmp_path / f"{name}.txt").write_text(answer)
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\nexec cat "{tmp_path / name}.txt"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    readings = Sensors(system="Darwin").read()
    assert (readings.speed_percent, readings.thermal_level, readings.memory_level) == (64, 3, 2)


def test_this_machine_itself_is_read_without_an_error() -> None:
    assert Sensors().read() is not None


# Looking again and again.


class Scripted:
    """Sensors that say what a test wants."""

    def __init__(self) -> None:
        self.says = WELL
        self.looks = 0

    def read(self) -> Readings:
        self.looks += 1
        return self.says


async def test_changes_are_told_and_nothing_else_is() -> None:
    sensors, changes = Scripted(), list[str]()
    policy = PressurePolicy(look_seconds=0.001, calm_seconds=0.002)
    pressure = Pressure(policy, sensors)
    assert (pressure.share, pressure.detail) == (1.0, "")
    looking = asyncio.ensure_future(pressure.run(lambda: changes.append(pressure.detail)))
    await until(lambda: sensors.looks > 5)
    assert changes == []
    sensors.says = Readings(on_battery=True, battery_percent=80)
    await until(lambda: changes)
    seen = sensors.looks
    await until(lambda: sensors.looks > seen + 5)
    assert changes == ["on battery (80 %): half of its slots"]
    assert pressure.share == 0.5
    sensors.says = WELL
    await until(lambda: pressure.share == 1.0)
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert changes[-1] == ""

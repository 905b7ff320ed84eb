"""The table of mischief: what it may hold, what it must; and the moments that it waits for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

import outlive
from outlive.scripts.mayhem.mischief import MISCHIEF, Mischief, Target
from outlive.scripts.mayhem.scene import Moment, Scene
from outlive.scripts.mayhem.tally import Tally


def targets(piece: Mischief) -> set[Target]:
    return {blow.target for blow in piece.blows}


@pytest.mark.parametrize("piece", MISCHIEF, ids=lambda piece: piece.name)
def test_no_piece_kills_both_holders_of_the_descriptors(piece: Mischief) -> None:
    assert not (Target.KEEPER in targets(piece) and targets(piece) & {Target.BROKER, Target.CANDIDATE})


@pytest.mark.parametrize("piece", MISCHIEF, ids=lambda piece: piece.name)
def test_a_blow_that_needs_one_before_it_is_never_the_first(piece: Mischief) -> None:
    assert piece.blows[0].moment not in (Moment.STARTING, Moment.THEN)


def test_each_piece_has_a_name_of_its_own() -> None:
    described = {(piece.name, *(blow.within for blow in piece.blows)) for piece in MISCHIEF}
    assert len(described) == len(MISCHIEF)


def test_everybody_dies_at_every_moment_in_a_run_of_all() -> None:
    blows = [blow for piece in MISCHIEF if piece.weights.get("all") for blow in piece.blows]
    assert {blow.target for blow in blows} == {*Target}
    assert {blow.moment for blow in blows} == {*Moment} - {Moment.ENDING}  # in it nobody waits for one


def test_worker_and_broker_die_around_what_is_waited_for() -> None:
    pieces = [piece for piece in MISCHIEF if piece.weights.get("wakes")]
    firsts = {piece.blows[0].target for piece in pieces if piece.blows[0].moment is Moment.ENDING}
    assert firsts == {Target.WORKER, Target.BROKER}
    assert any(len(targets(piece)) == 2 for piece in pieces)


def test_worker_and_broker_die_in_either_order_at_once_and_apart() -> None:
    pairs = {
        (*(blow.target for blow in piece.blows), piece.blows[-1].within == 0)
        for piece in MISCHIEF
        if len(piece.blows) == 2 and piece.blows[1].moment is Moment.THEN
    }
    for first, second in ((Target.WORKER, Target.BROKER), (Target.BROKER, Target.WORKER)):
        assert {(first, second, True), (first, second, False)} <= pairs


@pytest.mark.parametrize("kind", ["broker", "keeper"])
def test_a_run_of_one_kind_kills_that_in_each_piece(kind: str) -> None:
    drawn = [piece for piece in MISCHIEF if piece.weights.get(kind)]
    assert drawn
    assert all(Target(kind) in targets(piece) for piece in drawn)


async def test_a_moment_reaches_who_waits_for_it_and_the_end_reaches_everybody() -> None:
    scene = Scene(cast("outlive.Host", None), Path(), Tally(), None)
    waiting = asyncio.create_task(scene.moment(Moment.DETACH))
    other = asyncio.create_task(scene.moment(Moment.RESUME))
    await asyncio.sleep(0)
    scene.at(Moment.DETACH, "t1")
    assert await waiting == "t1"
    assert not other.done()
    scene.over.set()
    assert await other == ""

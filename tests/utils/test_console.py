"""Messages: shown by commands, and by nothing else."""

from __future__ import annotations

import logging
import sys

import pytest

from rlr_ray.utils.console import messages_on, wide_console

logger = logging.getLogger("rlr_ray.somewhere")


def test_a_command_shows_messages_as_they_are_and_warnings_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    long = "[bold]not markup[/bold] " + "word " * 60
    with messages_on(wide_console()):
        logger.info(long)
        logger.debug("for nobody")
        logger.warning("the disk is full")
    assert capsys.readouterr().out == f"{long}\nwarning: the disk is full\n"


def test_a_library_shows_nothing_and_leaves_logging_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with messages_on(wide_console()):
        pass
    logger.info("quiet")
    assert capsys.readouterr() == ("", "")
    assert not logging.getLogger("rlr_ray").handlers and logging.getLogger("rlr_ray").level == logging.NOTSET


def test_a_message_is_shown_once_whoever_has_a_handler_of_root(capsys: pytest.CaptureFixture[str]) -> None:
    """Many a reward's module calls logging.basicConfig."""
    root, mine = logging.getLogger(), logging.StreamHandler(sys.stdout)
    root.addHandler(mine)
    try:
        with messages_on(wide_console()):
            logger.warning("said once")
    finally:
        root.removeHandler(mine)
    assert capsys.readouterr().out == "warning: said once\n" and logging.getLogger("rlr_ray").propagate

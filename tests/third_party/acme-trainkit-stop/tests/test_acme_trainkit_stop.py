from acme_trainkit_stop import Stop

from trainkit.testing import assert_conforms, assert_refuses, run_steps


def test_it_stops():
    run = run_steps({"stop": Stop(after=2)}, steps=4)
    assert (run.step, run.stop_reason) == (2, "2 safe points")


def test_it_keeps_the_promises_of_every_plugin():
    assert_conforms(Stop, after=100)


def test_wrong_options_are_refused():
    assert_refuses(Stop, "after", 0)

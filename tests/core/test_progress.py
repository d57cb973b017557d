"""Progress without a terminal."""

from kmq_jax.core.progress import Bar


def test_lines_tell_how_far_it_is_with_figures_of_its_own(capsys):
    bar = Bar(4, "training", "step", done=1, interval=0.0)
    bar.show(2, "loss 1.5")
    bar.say("stopped")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training: 2/4 (50 %), ") and lines[0].endswith(" s left, loss 1.5")
    assert lines[1:] == ["stopped"]


def test_short_work_and_hidden_work_say_nothing(capsys):
    for bar in (Bar(2, interval=60.0), Bar(2, interval=0.0, hidden=True)):
        bar.show(2)
        bar.close()
    assert not capsys.readouterr().err


def test_before_anything_is_done_nobody_knows_how_long_it_takes(capsys):
    Bar(4, "training", "step", interval=0.0).show(0)
    assert capsys.readouterr().err == "training: 0/4 (0 %), 0.0 step/s\n"

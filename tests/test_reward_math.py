"""Mathematics in any notation, in worker processes that hang, die or lose their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.errors import ConfigError
from grpo.rewards import Math
from grpo.types import Example, Failure, Sample
from grpo.verifiers.latex import extract_last_box, extract_last_boxes

ENDLESS = "9^{9^{9^9}}"


def build_sample(gold: str, completion: str) -> Sample:
    return Sample("q", completion, (1,), False, Example("q", gold, float), 0)


@pytest.fixture(scope="module")
def reward() -> Iterator[Math]:
    """Shares one pool with two workers among the tests."""
    reward = Math(seconds=10, workers=2)
    yield reward
    reward.close()


RIGHT = [
    ("72", "<answer>72</answer>"),
    ("72", "<answer>\n 72.\n</answer>"),
    ("72", "<answer>The answer is 72</answer>"),
    ("72", "<answer>12 * 6 = 72</answer>"),
    ("72", "so <answer>71</answer>, no, <answer>72</answer>"),  # the last counts
    ("72", "<answer><answer>72</answer></answer>"),
    ("72", "<answer>72"),
    ("72", "The answer is 72."),
    ("18", "<think>9 * 2 = 18</think> #### 18"),
    ("1,234", "<answer>1234</answer>"),
    ("1234567", "<answer>$1,234,567</answer>"),
    ("10 000", "<answer>10,000</answer>"),
    ("1,234.5", "<answer>1234.50</answer>"),
    (".5", "<answer>1/2</answer>"),
    (r"\frac{1}{2}", "<answer>0.5</answer>"),
    (r"$\frac{1}{2}$", "1/2"),
    (r"\boxed{\frac{3}{4}}", r"\boxed{\dfrac{3}{4}}"),
    (r"\frac{1}{\sqrt{2}}", r"thus \boxed{\frac{\sqrt{2}}{2}}."),  # nested braces
    (r"-\frac{1}{2}", "<answer>-0.5</answer>"),
    ("12", r"\boxed{12}, or maybe \boxed{13"),  # the last complete box
    ("50%", r"<answer>50\%</answer>"),
    (r"50\%", "<answer>0.5</answer>"),
    ("1e5", "<answer>100000</answer>"),
    (r"6 \times 10^{3}", "<answer>6000</answer>"),
    ("12.5", r"\boxed{\$12.50}"),
    ("(0,1]", "<answer>(0, 1]</answer>"),
    (r"x \in [1,2]", "<answer>[1,2]</answer>"),
    ("{1,2}", r"\boxed{\{2, 1\}}"),
    ("{1,2}", "<answer>1, 2</answer>"),
    ("(1,2)", "<answer>(1, 2)</answer>"),
    ("5 cm", r"<answer>5\text{ cm}</answer>"),
    ("60 km/h", "<answer>60</answer>"),
    ("12 feet", "<answer>12</answer>"),
    (r"30^\circ", "<answer>30</answer>"),
    ("x=2", "<answer>2</answer>"),
    ("2", "<answer>x = 2</answer>"),
    ("x^2+2x+1", "<answer>(x+1)^2</answer>"),
    ("2xy", "<answer>2yx</answer>"),
    (r"\frac{\pi}{2}", "<answer>pi/2</answer>"),
    (r"\sqrt{2}", "<answer>sqrt(2)</answer>"),
    (r"\sin(x)", "<answer>sin(x)</answer>"),
    ("3 + 4i", "<answer>4i + 3</answer>"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"<answer>\begin{pmatrix}1\\2\end{pmatrix}</answer>"),
    ("B", r"\boxed{\text{B}}"),
    (r"\text{East}", "<answer>East</answer>"),
    # Several boxes with at most an "and" between them are one answer, in any order.
    ("$3, 4$", r"so \boxed{3} and \boxed{4}"),
    (r"\boxed{3}\boxed{4}", r"\boxed{4, 3}"),
    ("3,4", r"\[ \boxed{4} \quad \text{or} \quad \boxed{3}. \]"),
    (r"\{3, 4\}", r"\boxed{3}, \boxed{4}"),
    ("3, 4, 5", r"$\boxed{3}$, $\boxed{4}$, and $\boxed{5}$"),
    ("3", r"\boxed{3}, \boxed{3}"),  # the same answer twice
    (
        "4",
        r"\boxed{3} is too small. Now it is \boxed{4}",
    ),  # words between the boxes: the last counts
    ("4", r"\boxed{3}. \boxed{4}"),  # and the end of a sentence
    ("3 and 4", r"\boxed{3 $ and $4}"),
    ("3 and 4", "<answer>4, 3</answer>"),
    (r"\{3\}", r"\boxed {\left\{ 3 \right\}}"),
    # The sentence's punctuation may be inside the formula.
    (r"$\frac{2}{3}$", r"It is $\frac{2}{3}.$"),
    (r"\sqrt{3}", r"\[ \sqrt{3}, \]"),
    ("(2,3)", "<answer>(2, 3).</answer>"),
    # Mixed numbers, in any notation.
    (r"\frac{7}{3}", "<answer>2 1/3</answer>"),
    ("-7/3", "The answer is -2 1/3."),
    ("2 1/3", r"\boxed{2\frac{1}{3}}"),
    ("2.5", "<answer>2½</answer>"),
    # Signs that math-verify itself doesn't know, or misreads.
    ("-5", "<answer>\u22125</answer>"),
    ("5000", r"\boxed{5\,000}"),
    ("5000", "<answer>$5\u202f000$</answer>"),
    ("5000", "$5 000$"),
    (r"\sqrt{5}", "<answer>√5</answer>"),
    (r"x^2+1", "<answer>x² + 1</answer>"),
    ("10^6", "<answer>10⁶</answer>"),
    (r"(0,\infty)", "<answer>(0, ∞)</answer>"),
    # An interval and its inequalities are the same set, whichever is the gold answer.
    (r"x \in [-2,7]", r"$-2 \le x \le 7$"),
    ("[-2,7]", r"$-2 \leq x \leq 7$"),
    (r"$-2 \leq x \leq 7$", "x \\in [-2,7]"),
    (r"\boxed{W(n) = 1 \text{ and } W(n) = -1}", r"$W(n) = 1 \text{ or } W(n) = -1$"),
    # Line breaks in a formula make no difference.
    ("9", "$\n9\n$"),
    # Other habits.
    ("28%", "28 percent"),
    (r"\pm 3", "3, -3"),
    ("x=3, x=-3", r"x = 3 \text{ or } x = -3"),
    ("5", r"$5~\mathrm{cm}$"),  # sympy can't read it, but it has one number
]
WRONG = [
    ("72", "<answer>73</answer>"),
    ("72", "I have no idea"),
    ("72", ""),
    ("72", "<answer></answer>"),
    ("-3", "<answer>3</answer>"),
    ("1/3", "<answer>0.333</answer>"),
    ("1.2", "<answer>1, 2</answer>"),
    ("1e5", "<answer>1</answer>"),
    ("2", r"<answer>2\sqrt{3}</answer>"),
    ("(0,1]", "<answer>[0, 1]</answer>"),
    ("(1,2)", "<answer>(2, 1)</answer>"),
    ("x=2", "<answer>y = 2</answer>"),
    # One right box of several is not enough, or else many guesses at once would be right.
    ("4", r"\boxed{3}, \boxed{4}"),
    ("3, 4", r"\boxed{4}"),
    ("3, 4", r"\boxed{3} is too small. Now it is \boxed{4}"),
    (r"[-2,7]", r"$-2 < x \le 7$"),
    # If words are between the boxes, in the gold answer too, the last box counts.
    ("(3, 3), (1, 1)", r"$\boxed{(3, 3)} \text{ for part (a) and } \boxed{(1, 1)}$"),
    (r"\boxed{1} papers and \boxed{2} bins", r"$\boxed{1,2}$"),
    (r"y_1 = 2x, y_2 = 3x", r"\(y_1 = \boxed{2x}\) and \(y_2 = \boxed{3x}\)"),
    # A function's name and its variable are part of the answer.
    ("f(x)", "$f(y)$"),
    (r"\boxed{W(n) = 1 \text{ and } W(n) = -1}", "W(x)=1orW(x)=-1"),
    # The last box counts, not the text after it: a prompt may ask for a box.
    ("7", r"$\boxed{5}$. The answer is 7."),
    # A comma is no decimal point: 1,5 is written like the list 3,4 and in English means it.
    ("1.5", "<answer>1,5</answer>"),
    # A part of an unreadable answer, a mixed number or a power is not the answer.
    ("0", r"$\sum_{k=0}^n\bigl(k\bigr)$"),
    ("2", "$2^{10}.$"),
    ("2", "<answer>2 1/3</answer>"),
    ("1", "The answer is $1/3.$"),
    ("10", "<answer>10⁶</answer>"),
    # A percentage equals the number before its sign, or a hundredth of it, but needs the sign.
    ("0.28", "28"),
    # Decimals are compared to six places; a coarser rounding is another number.
    (r"(\frac{3}{5},\frac{8}{3}]", "(0.6,2.67]"),
    (r"1 - \frac{1}{e}", r"1 + \frac{1}{e}"),
    ("72", "1+" * 5000),
    ("72", "$" * 3000),
]
UNREADABLE = [("Paris", "<answer>Paris</answer>"), ("", "<answer>1</answer>"), ("yes", "yes")]


@pytest.mark.parametrize(
    ("pairs", "value"), [(RIGHT, 1.0), (WRONG, 0.0), (UNREADABLE, None)], ids=["1", "0", "None"]
)
def test_answers_are_compared_as_mathematics(
    reward: Math, pairs: list[tuple[str, str]], value: float | None
) -> None:
    values = reward([build_sample(gold, completion) for gold, completion in pairs])
    assert [pair for pair, result in zip(pairs, values, strict=True) if result != value] == []


def test_boxes_are_found_in_one_pass() -> None:
    """A search of the remaining text for each box would take minutes, in the trainer's process."""
    start = time.monotonic()
    assert extract_last_box(r"\boxed{" * 50_000 + "1}") == "1"
    assert extract_last_box(r"\boxed{" * 50_000) is None
    assert extract_last_box(r"\boxed{\left\{ 1 \right.} or \boxed{2") == r"\left\{ 1 \right."
    assert len(extract_last_boxes(r"\boxed{1}" + " " * 50_000 + r"and\boxed{2}")) == 2
    assert extract_last_boxes(r"\boxed{1}" + " or" * 50_000 + r" so\boxed{2}") == ["2"]
    assert time.monotonic() - start < 5


def test_long_texts_are_read_in_time(reward: Math) -> None:
    """None of them may become a failure, which would hide that it is wrong."""
    marks = (r"\(", r"\[", "$", " ", " .", r"\boxed{", "sqrt(", "5 ", "5 000 ", "1 1/", "½", "√(")
    texts = [f"so 5{mark * 20_000}x" for mark in marks]
    assert reward([build_sample("72", text) for text in texts]) == [0.0] * len(texts)


def test_an_answer_that_never_ends_is_a_failure_and_harms_no_other() -> None:
    reward = Math(seconds=2, workers=2)
    reward([build_sample("1", "1")] * 8)
    golds = ["1", "72", ENDLESS, "2"]
    texts = ["<answer>1</answer>", f"<answer>{ENDLESS}</answer>", "<answer>3</answer>", "2"]
    start = time.monotonic()
    values = reward([build_sample(gold, text) for gold, text in zip(golds, texts, strict=True)])
    assert values == [1.0, Failure("no answer within 2 s"), Failure("no answer within 2 s"), 1.0]
    assert time.monotonic() - start < 60  # without a time limit, for ever
    reward.close()


def test_it_works_off_the_main_thread_whose_end_harms_no_worker(reward: Math) -> None:
    values: list[object] = []
    pair = [build_sample("72", "<answer>72</answer>")]
    for _ in range(2):
        thread = threading.Thread(target=lambda: values.extend(reward(pair)))
        thread.start()
        thread.join()
    fresh = Math(workers=1)  # its worker is started by a thread that has ended by then
    thread = threading.Thread(target=lambda: values.extend(fresh(pair)))
    thread.start()
    thread.join()
    before = set(multiprocessing.active_children())
    assert [*values, *fresh(pair)] == [1.0] * 4
    assert before == set(multiprocessing.active_children())
    fresh.close()


def test_workers_stay_between_calls_without_torch_and_go_when_closed() -> None:
    others = set(multiprocessing.active_children())
    reward = Math(workers=2)
    assert set(multiprocessing.active_children()) == others  # no process before the first call
    assert reward([build_sample("1", "1")]) == [1.0]
    workers = set(multiprocessing.active_children()) - others
    assert reward([build_sample("1", "1")] * 20) == [1.0] * 20
    assert set(multiprocessing.active_children()) - others == workers
    assert len(workers) == 2
    for worker in workers:
        assert "torch" not in Path(f"/proc/{worker.pid}/maps").read_text()
    reward.close()
    assert not any(worker.is_alive() for worker in workers)
    assert reward([build_sample("1", "1")]) == [1.0]  # and starts again
    reward.close()


def test_a_worker_that_is_killed_costs_one_answer_and_no_more() -> None:
    reward = Math(seconds=20, workers=1)
    others = set(multiprocessing.active_children())
    assert reward([build_sample("1", "1")]) == [1.0]
    (worker,) = set(multiprocessing.active_children()) - others
    assert worker.pid is not None
    threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()
    values = reward([build_sample("72", ENDLESS), build_sample("1", "1")])
    assert values == [Failure("its worker died, exit code -9"), 1.0]

    (worker,) = set(multiprocessing.active_children()) - others
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)  # idle
    time.sleep(0.5)
    assert reward([build_sample("1", "1")]) == [1.0]
    reward.close()


ORPHAN = f"""
if __name__ == "__main__":
    import multiprocessing, signal, threading
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell may be deaf to it
    from grpo.rewards.math import Math
    from grpo.types import Example, Sample
    reward = Math(seconds=600, workers=2)
    def build_sample(text):
        return Sample("q", text, (1,), False, Example("q", "72", float), 0)
    reward([build_sample("1")])
    busy = threading.Thread(target=reward, args=([build_sample("{ENDLESS}")],), daemon=True)
    busy.start()
    busy.join(1)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    busy.join()
"""


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent_even_a_busy_one(tmp_path: Path, death: int) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        process.send_signal(death)
        deadline = time.monotonic() + 10
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_alive, workers))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("options", "says"), [({"seconds": 0}, "seconds=0"), ({"workers": 0}, "workers=0")]
)
def test_a_bad_option_is_named_with_its_value(options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Math(**options)

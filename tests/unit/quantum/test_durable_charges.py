"""What was spent stays spent: over restarts, over processes, and wherever a crash falls."""

import math
import os
import random
import signal
import sqlite3
import threading
import time

import pytest

from dp_flash_attention.core.errors import (
    BudgetExhaustedError,
    InvalidInputError,
    NoiseReuseError,
    RunStateError,
)
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import SecretKey
from dp_flash_attention.quantum import durable_charges
from dp_flash_attention.quantum.amplitude_estimation_resistant import AmplitudeEstimationResistant
from dp_flash_attention.quantum.charges import ConcentratedBudget
from dp_flash_attention.quantum.durable_charges import DurableChargeBook

TOTAL = PrivacyBudget(epsilon=1.0, delta=1e-6)
KEY = SecretKey.from_bytes(bytes(range(32)))
ONE = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
PAID = "SELECT query, answer FROM paid"
RHO = 2.0**-6  # a whole number of millionths
PRICE = PrivacyBudget(epsilon=0.2, delta=1e-8)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture(autouse=True)
def _every_connection_is_closed(monkeypatch):
    """Python 3.13 warns of those that are not."""
    connect, made = sqlite3.connect, []

    def kept(*arguments, **options):
        made.append(connect(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", kept)
    yield
    for connection in made:
        connection.close()


@pytest.fixture
def path(tmp_path):
    DurableChargeBook.create(tmp_path / "charges.db", key=KEY, total=TOTAL).close()
    return tmp_path / "charges.db"


def opened(path, key=KEY):
    return DurableChargeBook.open(path, key=key)


def in_child(work):
    """Runs ``work`` in a forked process and returns its exit code (negative for a signal)."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = int(work() or 0)
        finally:
            os._exit(code)
    return child


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_restart_keeps_what_was_spent_and_charges_like_the_book_in_memory(path):
    memory = ConcentratedBudget(TOTAL)
    assert opened(path).limit_rho == memory.limit_rho
    for i in range(4):
        book = opened(path)
        for charges in (book, memory):
            charges.charge(rho=1e-3 + 1e-9 * i, distance=1e-20)
        assert book.spent_rho == memory.spent_rho > 0
        book.close()
    assert opened(path).spent_rho == memory.spent_rho
    with pytest.raises(BudgetExhaustedError, match="nothing was computed or spent"):
        opened(path).charge(rho=memory.limit_rho, distance=0.0)
    assert opened(path).spent_rho == memory.spent_rho


@pytest.mark.parametrize("make", [lambda path: opened(path), lambda path: ConcentratedBudget(TOTAL)])
def test_a_query_pays_once_and_has_one_answer(path, make):
    book = make(path)
    for _ in range(3):
        book.charge(rho=1e-3, distance=0.0, query=b"q")
    assert book.spent_rho == pytest.approx(1e-3, abs=1e-6)
    assert book.bind(query=b"q", answer=b"a")
    assert book.bind(query=b"q", answer=b"a")
    assert not book.bind(query=b"q", answer=b"b")
    assert book.bind(query=b"q", answer=b"a")
    with pytest.raises(InvalidInputError, match="charged before"):
        book.bind(query=b"never", answer=b"a")


@pytest.mark.parametrize("make", [lambda path: opened(path), lambda path: ConcentratedBudget(TOTAL)])
def test_distances_round_up_and_are_a_budget_of_their_own(path, make):
    book = make(path)
    limit = 0.01 * 1e-6 / (1 + math.e)
    for distance in (1.01 * limit, 1.0, 1e300):
        with pytest.raises(BudgetExhaustedError, match="away from ideal"):
            book.charge(rho=1e-6, distance=distance)
    book.charge(rho=1e-6, distance=0.9 * limit)
    with pytest.raises(BudgetExhaustedError):
        book.charge(rho=1e-6, distance=0.2 * limit)
    with pytest.raises(BudgetExhaustedError, match="costs rho"):
        book.charge(rho=1e300, distance=0.0)


def test_the_smallest_distance_takes_a_unit(path):
    opened(path).charge(rho=1e-6, distance=1e-300)
    assert sqlite3.connect(path).execute("SELECT distance FROM book").fetchone() == (1,)


@pytest.mark.parametrize(("rho", "distance"), [(0.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (0.1, -1.0)])
def test_what_is_no_price_is_refused(path, rho, distance):
    with pytest.raises(InvalidInputError, match="charge"):
        opened(path).charge(rho=rho, distance=distance)


@forks
@pytest.mark.parametrize("shared", [True, False], ids=["the parent's book", "books of their own"])
def test_processes_that_share_the_file_never_overspend_and_leave_nothing_unused(path, shared):
    book = opened(path)
    price = book.limit_rho / 40
    book.charge(rho=1e-6, distance=0.0)

    def spend():
        mine = book if shared else opened(path)
        booked = 0
        try:
            while True:
                mine.charge(rho=price, distance=0.0)
                booked += 1
        except BudgetExhaustedError:
            return booked

    children = [in_child(spend) for _ in range(3)]
    booked = sum(exit_code(child) for child in children)
    rows = sqlite3.connect(path).execute("SELECT count(*), sum(micro_rho) FROM paid").fetchone()
    assert rows[0] == booked + 1
    assert book.spent_rho == rows[1] / 1e6 <= book.limit_rho
    assert 37 <= booked <= 40


@forks
def test_two_processes_that_ask_the_same_query_pay_once(path):
    def ask():
        book = opened(path)
        for i in range(20):
            book.charge(rho=1e-4, distance=0.0, query=bytes([i]))
            if not book.bind(query=bytes([i]), answer=bytes([i, 7])):
                return 1

    assert [exit_code(child) for child in [in_child(ask) for _ in range(2)]] == [0, 0]
    assert opened(path).spent_rho == pytest.approx(20e-4, abs=3e-5)


def test_threads_share_a_book(path):
    book, errors = opened(path), []

    def spend(i):
        try:
            book.charge(rho=1e-4, distance=0.0, query=bytes([i % 10]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=spend, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert book.spent_rho == pytest.approx(10e-4, abs=2e-5)


def killed_before_statement(path, number):
    """Charges and binds in a process that is killed as SQLite starts its ``number``-th statement.

    Returns its exit code, and what it had published by then.
    """
    published = path.with_name("published")
    published.write_bytes(b"")

    def work():
        book = opened(path)
        left = [number]

        def count(statement):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        book._connection.set_trace_callback(count)
        book.charge(rho=RHO, distance=0.0, query=b"q")
        if book.bind(query=b"q", answer=b"first"):
            published.write_bytes(b"first")

    return exit_code(in_child(work)), published.read_bytes()


def crash_everywhere(tmp_path):
    """Kills at every statement, and returns (what was published, Σρ after a restart, may another answer go out)."""
    found = []
    for number in range(40):
        path = tmp_path / f"{number}.db"
        DurableChargeBook.create(path, key=KEY, total=TOTAL).close()
        code, published = killed_before_statement(path, number)
        book = opened(path)
        spent = book.spent_rho
        book.charge(rho=RHO, distance=0.0, query=b"q")
        found.append((published, spent, book.bind(query=b"q", answer=b"second")))
        assert book.spent_rho == RHO
        book.close()
        if code == 0:
            return found
        assert code == -signal.SIGKILL
    raise AssertionError("it never came to its end")


@forks
def test_wherever_a_crash_falls_nothing_unpaid_was_published_and_nothing_is_answered_twice(tmp_path):
    found = crash_everywhere(tmp_path)
    assert len(found) > 8  # both transactions were cut at each statement
    assert {spent for _, spent, _ in found} == {0.0, RHO}
    for published, spent, another in found:
        assert not (published and (spent == 0.0 or another))
    assert found[-1] == (b"first", RHO, False)
    assert (b"", RHO, True) in found  # paid, nothing published: answered for nothing, once


@forks
@pytest.mark.parametrize("broken", ["charge", "bind"])
def test_a_book_that_writes_nothing_before_publication_is_noticed(tmp_path, monkeypatch, broken):
    parent = os.getpid()
    whole = {name: getattr(DurableChargeBook, name) for name in ("charge", "bind")}

    def careless(name):
        def method(self, **arguments):
            return True if os.getpid() != parent else whole[name](self, **arguments)

        return method

    monkeypatch.setattr(DurableChargeBook, broken, careless(broken))
    if broken == "charge":
        monkeypatch.setattr(DurableChargeBook, "bind", careless("bind"))
    published, spent, another = crash_everywhere(tmp_path)[-1]
    assert published
    assert spent == 0.0 or another


@forks
def test_processes_killed_at_any_time_publish_one_answer_a_query_and_all_of_them_are_paid(path):
    log = path.with_name("log")

    def publish():
        book = opened(path)
        with open(log, "ab", buffering=0) as file:
            for i in range(10**6):
                query, answer = i.to_bytes(8, "big"), os.urandom(8)
                book.charge(rho=1e-6, distance=1e-25, query=query)
                if book.bind(query=query, answer=answer):
                    file.write(query + answer)

    wait = random.Random(0)
    for _ in range(12):
        children = [in_child(publish) for _ in range(2)]
        time.sleep(wait.uniform(0.01, 0.12))
        for child in children:
            os.kill(child, signal.SIGKILL)
        assert {exit_code(child) for child in children} == {-signal.SIGKILL}
    book = opened(path)  # which adds up all prices
    lines = [log.read_bytes()[i : i + 16] for i in range(0, log.stat().st_size, 16)]
    bound = {bytes(row[0] + row[1]) for row in sqlite3.connect(path).execute(PAID) if row[1] is not None}
    assert lines
    assert len(set(lines)) == len(lines)
    assert set(lines) <= bound
    assert book.spent_rho >= len({line[:8] for line in lines}) * 1e-6
    assert len(bound - set(lines)) <= 24  # one for each kill at most: bound, not yet published


def memoised(path, version="v1"):
    return AmplitudeEstimationResistant(key=KEY, charges=opened(path), data_version=version)


def ask(mechanism, query, value=40.0):
    return mechanism.answer(query, lambda: value, sensitivity=ONE, budget=PRICE)


def test_after_a_restart_repeats_have_the_same_bytes_cost_nothing_and_go_on_when_the_budget_is_gone(path):
    first = {i: ask(memoised(path), i).value for i in range(3)}
    spent = opened(path).spent_rho
    assert {i: ask(memoised(path), i).value for i in range(3)} == first
    assert opened(path).spent_rho == spent > 0

    def use_up():
        for i in range(3, 500):
            ask(memoised(path), i)

    with pytest.raises(BudgetExhaustedError):
        use_up()
    assert {i: ask(memoised(path), i).value for i in range(3)} == first
    assert opened(path).spent_rho <= opened(path).limit_rho


def test_after_a_restart_changed_data_are_not_answered_for_nothing(path):
    """The repeat would be a second, independent answer that nobody paid for."""
    ask(memoised(path), "q", 40.0)
    with pytest.raises(NoiseReuseError, match="data_version"):
        ask(memoised(path), "q", 41.0)
    spent = opened(path).spent_rho
    ask(memoised(path, "v2"), "q", 41.0)
    assert opened(path).spent_rho == pytest.approx(2 * spent, abs=1e-6)


def test_after_a_restart_other_noise_for_the_same_data_is_not_released_either(path, monkeypatch):
    """As from a version of the library with another sampler."""
    ask(memoised(path), "q")
    add_noise = AmplitudeEstimationResistant._add_noise

    def one_more(self, key, plan, finish):
        add_noise(self, key, plan, lambda start, noise: finish(start, noise + 1))

    monkeypatch.setattr(AmplitudeEstimationResistant, "_add_noise", one_more)
    with pytest.raises(NoiseReuseError, match="raise the epoch"):
        ask(memoised(path), "q")


def test_after_a_restart_prices_under_two_relations_are_not_added_up(path):
    ask(memoised(path), "q")
    replaced = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.REPLACE_ONE)
    with pytest.raises(InvalidInputError, match="one relation"):
        memoised(path).answer("p", lambda: 1.0, sensitivity=replaced, budget=PRICE)


@pytest.mark.parametrize("durable", [True, False])
def test_a_release_says_what_its_charge_book_rests_on(path, durable):
    charges = opened(path) if durable else ConcentratedBudget(TOTAL)
    found = ask(AmplitudeEstimationResistant(key=KEY, charges=charges, data_version="v1"), "q")
    assert any(("older copy" if durable else "in memory") in line for line in found.assumed)


def test_the_file_shows_neither_queries_nor_answers(path):
    ask(memoised(path), "income of Anna", 12345.0)
    book = sqlite3.connect(path)
    query, answer = book.execute("SELECT query, answer FROM paid").fetchone()
    assert len(query) == len(answer) == 64
    other = memoised(path, "v2")
    ask(other, "income of Anna", 12345.0)
    assert len({row[0] for row in book.execute("SELECT answer FROM paid")}) == 2


def test_a_book_is_never_overwritten_and_never_made_up(path, tmp_path):
    with pytest.raises(FileExistsError):
        DurableChargeBook.create(path, key=KEY, total=TOTAL)
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "missing.db")
    assert not (tmp_path / "missing.db").exists()


def test_another_keys_book_is_refused(path):
    with pytest.raises(InvalidInputError, match="this memo key"):
        opened(path, SecretKey.from_bytes(bytes(32)))


def altered(path, statement):
    book = sqlite3.connect(path)
    book.execute("PRAGMA ignore_check_constraints = ON")
    book.execute(statement)
    book.commit()
    book.close()


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE book SET epsilon = 100", "this memo key"),
        ("UPDATE book SET delta = 'x'", "a budget"),
        ("UPDATE book SET micro_rho = 0", "add up"),
        ("UPDATE book SET limit_micro_rho = limit_micro_rho * 10", "add up"),
        ("DELETE FROM paid", "add up"),
        ("DELETE FROM book", "a budget"),
        ("DROP TABLE paid", "RunState"),
        ("PRAGMA user_version = 2", "of this version"),
        ("PRAGMA application_id = 1", "of this version"),
    ],
)
def test_an_altered_book_is_refused(path, statement, said):
    opened(path).charge(rho=1e-3, distance=0.0)
    altered(path, statement)
    if said == "RunState":
        with pytest.raises(RunStateError, match="nothing was released"):
            opened(path)
    else:
        with pytest.raises(InvalidInputError, match=said):
            opened(path)


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 5000], ids=len)
def test_a_foreign_or_damaged_file_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidInputError, match="charge book file"):
        opened(path)
    assert path.read_bytes() == content


def test_a_page_that_was_overwritten_is_noticed(path):
    book = opened(path)
    for i in range(200):
        book.charge(rho=1e-6, distance=0.0, query=bytes([i]) * 64)
    book.close()
    content = bytearray(path.read_bytes())
    content[3 * 4096 : 3 * 4096 + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="charge book file"):
        opened(path)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_links_and_books_that_others_can_write_are_refused(path, tmp_path):
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InvalidInputError, match="no link"):
        opened(tmp_path / "link")
    path.chmod(0o620)
    with pytest.raises(InvalidInputError, match="chmod 600"):
        opened(path)


def test_a_file_that_stays_locked_releases_nothing(path, monkeypatch):
    monkeypatch.setattr(durable_charges, "_WAIT_S", 0.05)
    book = opened(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunStateError, match="locked"):
        book.charge(rho=RHO, distance=0.0)
    other.execute("ROLLBACK")
    book.charge(rho=RHO, distance=0.0)
    assert book.spent_rho == RHO


def test_commits_are_on_the_disk_before_they_return(path):
    book = opened(path)
    assert book._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert book._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_total_beyond_all_sense_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(InvalidInputError, match="epsilon"):
        DurableChargeBook.create(tmp_path / "b", key=KEY, total=PrivacyBudget(epsilon=1e6, delta=1e-6))
    assert not (tmp_path / "b").exists()

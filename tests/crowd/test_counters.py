"""Statistics add up."""

import pytest

from .driver import SHORT, with_adapters


def check_course(stats, before):
    """What the counters of a text's way through the engine must be after test_statistics_add_up's requests."""
    course, total = stats.course, stats.total
    assert course.texts.count == 13 and course.texts.total == 13 and course.max_tokens.total == 13 * 6
    assert course.prompt_tokens.total == 13 * 150 and course.generated_tokens.total == 72
    for times in (course.prefill_time, course.decode_time, course.inference_time, course.time_per_token):
        assert times.count == 12
    assert 12 <= course.queue_time.count <= 13 and course.preemptions.count == 13
    inference = course.prefill_time.total + course.decode_time.total
    assert course.inference_time.total == pytest.approx(inference)
    assert course.inference_time.total < total.latency.total
    assert course.decode_time.total == pytest.approx(total.inter_token_time.total)
    assert course.step_tokens.count == stats.steps == sum(times.count for times in stats.step_times.values())
    assert sum(times.total for times in stats.step_times.values()) == pytest.approx(stats.step_seconds)
    # Every row of a prompt that was not cached, and one for each token but the first of a text; the cancelled text's
    # rows may be among them.
    rows = total.prompt_tokens - total.cached_tokens + total.generated_tokens - 12
    assert rows <= course.step_tokens.total <= rows + 150
    assert {name: (load.running + load.waiting) for name, load in before.load_by_adapter.items()} == {"": 4, "n": 8}
    assert stats.load_by_adapter == {}
    assert stats.adapter_states["n"].state == "resident" and stats.adapter_states["n"].bytes > 0
    assert stats.by_adapter["n"].last_request >= before.by_adapter["n"].last_request
    copy = course.copy()
    course.step_tokens.add(1)
    assert copy.step_tokens.count == course.step_tokens.count - 1


def test_statistics_add_up(weights, shelf):
    driver = with_adapters(weights, shelf)
    for i in range(12):
        driver.submit("n" if i % 3 else None, params=SHORT)
    cancelled = driver.submit("a1", params=SHORT)
    driver.step()
    driver.engine.cancel(cancelled)
    before = driver.engine.stats()
    driver.run()
    stats = driver.engine.stats()
    total, by = stats.total, stats.by_adapter
    assert before.running + before.waiting == 12 and stats.running == stats.waiting == 0
    assert total.requests == 13 and total.finished == {"length": 12, "abort": 1}
    assert total.generated_tokens == 72 and total.prompt_tokens == 12 * 150
    assert by["n"].generated_tokens == 48 and by[""].generated_tokens == 24
    assert total.time_to_first_token.count == 12 and total.inter_token_time.count == 60
    assert total.latency.count == 13 and total.latency.total > total.time_to_first_token.total > 0
    assert stats.adapters.registered == 8 and stats.adapters.in_use == 0
    assert stats.pages_held == 0 and stats.pages_cached > 0 and stats.steps > 0
    check_course(stats, before)
    driver.engine.reset_prefix_cache()
    assert driver.engine.stats().pages_cached == 0
    driver.idle()

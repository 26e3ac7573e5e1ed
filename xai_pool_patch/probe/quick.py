"""The questions that are asked by default: a minute or two, and a few hundred characters."""

from __future__ import annotations

from ..pool.clearing import CLEAR
from .question import Answer, Question, Verdict
from .service import PONG, VOICE, RefusedError, Service, Socket, Spoken, described, now

HELLO = "Hello there."
LONG = (
    "Thank you for calling. Let me look up your order first. It left the warehouse last night,"
    " and it should be with you on Thursday, some time between nine and twelve o'clock."
)
PIECES = ("Your order left the warehouse ", "last night.")
UNSPOKEN = {"empty": "", "blank": " ", "dots": "…"}

SAMPLES = 3
"""How often a time is measured. The shortest counts: what delays a message is not of interest."""


async def _handshake(service: Service) -> Answer:
    async with service.open() as socket:
        took = socket.handshake
        round_trip = await _round_trip(socket)
    parts = [("DNS", took.dns), ("TCP and TLS", took.connect), ("upgrade", took.upgrade)]
    named = [f"{name} {_ms(seconds)}" for name, seconds in parts if seconds is not None]
    found = f"{', '.join(named)}: {_ms(took.total)}"
    if round_trip is None:
        return Answer(Verdict.UNKNOWN, f"{found}; no answer on the open connection")
    return Answer(
        _verdict(round_trip < took.total),
        f"{found}; round trip {_ms(round_trip)}",
        measured=_in_ms(handshake=took.total, round_trip=round_trip),
    )


async def _round_trip(socket: Socket) -> float | None:
    pings = [await socket.ping()]
    if pings[0] is None:
        return await socket.clear()
    pings += [await socket.ping() for _ in range(SAMPLES - 1)]
    return min((ping for ping in pings if ping is not None), default=None)


async def _first_audio(service: Service) -> Answer:
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(SAMPLES):
        began = now()
        async with service.open() as socket:
            handshake = now() - began
            for times, delay in ((cold, handshake), (warm, 0.0)):
                spoken = await socket.speak(HELLO)
                if spoken.first_audio is None:
                    return Answer(Verdict.UNKNOWN, spoken.outcome)
                times.append(delay + spoken.first_audio)
    return Answer(
        _verdict(min(warm) < min(cold)),
        f"{_ms(min(cold))} with a handshake, {_ms(min(warm))} without",
        measured=_in_ms(cold=min(cold), warm=min(warm)),
    )


async def _second_utterance(service: Service) -> Answer:
    async with service.open() as socket:
        first, second = [await socket.speak(HELLO) for _ in range(2)]
    if not _is_heard(first):
        return Answer(Verdict.UNKNOWN, f"first utterance: {first.outcome}")
    found = f"{first.audio:.1f} s of audio, then {second.audio:.1f} s; {second.outcome}"
    return Answer(_verdict(_is_heard(second)), found)


async def _ping(service: Service) -> Answer:
    async with service.open() as socket:
        pong = await socket.ping()
        if pong is None:
            return Answer(Verdict.OTHERWISE, f"no PONG: {socket.why_silent()}")
    return Answer(Verdict.AS_SUPPOSED, f"PONG after {_ms(pong)}", measured=_in_ms(pong=pong))


async def _fence(service: Service) -> Answer:
    """Without it the pool cannot check a cancel, so anything but the right order rules it out."""
    orders = []
    async with service.open() as socket:
        for _ in range(SAMPLES):
            mark, sent_at = socket.mark, now()
            await socket.send_ping()
            await socket.say(HELLO)
            await socket.send("text.done")
            spoken = await socket.listen(since=mark, sent_at=sent_at)
            pong = await socket.first(PONG, since=mark)
            if pong is None or spoken.first_audio is None:
                missing = "audio" if spoken.first_audio is None else "PONG"
                found = f"cannot be known without {missing}"
                return Answer(Verdict.UNKNOWN, found, {"interruption": "discard"})
            orders.append(pong.at < sent_at + spoken.first_audio)
    late = orders.count(False)
    if late:
        found = f"audio came before the PONG in {late} of {SAMPLES} utterances"
        return Answer(Verdict.OTHERWISE, found, {"interruption": "discard"})
    return Answer(Verdict.AS_SUPPOSED, f"the PONG came first, {SAMPLES} times of {SAMPLES}")


def _longest_clear(round_trip: float | None) -> float:
    """How long the pool waits for an acknowledgement."""
    return CLEAR.at_most if round_trip is None else CLEAR.seconds(round_trip)


async def _clear_speaking(service: Service) -> Answer:
    async with service.open() as socket:
        longest = _longest_clear(await socket.ping())
        await socket.say(LONG)
        await socket.send("text.done")
        if await socket.first("audio.delta", since=0) is None:
            return Answer(Verdict.UNKNOWN, f"no audio to cancel: {socket.why_silent()}")
        mark, took = socket.mark, await socket.clear()
        if took is None:
            return _not_acknowledged(socket, mark)
        acknowledged = socket.mark
        await socket.first("error", since=acknowledged, timeout=service.timing.quiet)
        leaks = socket.count("audio.delta", since=acknowledged)
        spoken = None if leaks else await socket.speak(HELLO)
    return _cleared(took, longest, leaks, spoken)


def _cleared(took: float, longest: float, leaks: int, spoken: Spoken | None) -> Answer:
    found = f"acknowledged after {_ms(took)}, of {_ms(longest)} that the pool waits"
    if leaks:
        found += f", and {_plural(leaks, 'piece')} of audio afterwards"
    elif spoken is not None and not _is_heard(spoken):
        found += f"; next utterance: {spoken.outcome}"
    else:
        found += ", no audio afterwards, the next utterance was spoken"
    is_final = not leaks and spoken is not None and _is_heard(spoken)
    so = is_final and took <= longest
    advises = {"interruption": "clear" if so else "discard"}
    return Answer(_verdict(so), found, advises, _in_ms(acknowledged=took))


def _not_acknowledged(socket: Socket, mark: int) -> Answer:
    errors = [heard for heard in socket.heard[mark:] if heard.type == "error"]
    why = described(errors[0]) if errors else socket.why_silent()
    return Answer(Verdict.OTHERWISE, f"not acknowledged: {why}", {"interruption": "discard"})


async def _wordless(service: Service) -> Answer:
    outcomes, unanswered = [], False
    for name, text in UNSPOKEN.items():
        async with service.open() as socket:
            if text:
                spoken = await socket.speak(text)
            else:
                mark, sent_at = socket.mark, now()
                await socket.send("text.done")
                spoken = await socket.listen(since=mark, sent_at=sent_at)
            answered = spoken.is_done or socket.count("error") > 0
        unanswered |= not answered
        audio = f"{spoken.audio:.1f} s of audio, " if spoken.audio else ""
        outcomes.append(f"{name}: {audio}{spoken.outcome}")
    return Answer(_verdict(not unanswered), "; ".join(outcomes))


async def _after_done(service: Service) -> Answer:
    async with service.open() as socket:
        spoken = await socket.speak(HELLO)
        if not spoken.is_done:
            return Answer(Verdict.UNKNOWN, spoken.outcome)
        mark = socket.mark
        types = ("audio.delta", "audio.done", "error")
        more = await socket.first(*types, since=mark, timeout=service.timing.quiet)
    if more is not None:
        return Answer(Verdict.OTHERWISE, f"{described(more)} came after audio.done")
    return Answer(Verdict.AS_SUPPOSED, f"nothing within {service.timing.quiet:g} s")


async def _text_gap(service: Service) -> Answer:
    async with service.open() as socket:
        sent_at = now()
        await socket.say(PIECES[0])
        types = ("audio.done", "error")
        early = await socket.first(*types, since=0, timeout=service.timing.gap)
        if early is not None or not socket.is_open:
            why = socket.why_silent() if early is None else described(early)
            return Answer(Verdict.OTHERWISE, f"within the gap of {service.timing.gap:g} s: {why}")
        spoke_at_once = socket.count("audio.delta") > 0
        await socket.say(PIECES[1])
        await socket.send("text.done")
        spoken = await socket.listen(since=0, sent_at=sent_at)
    when = "in the gap" if spoke_at_once else "only after the gap"
    found = f"audio began {when} of {service.timing.gap:g} s; {spoken.outcome}"
    return Answer(_verdict(_is_heard(spoken)), found)


async def _unknown_message(service: Service) -> Answer:
    async with service.open() as socket:
        await socket.send("probe.unknown")
        answer = await socket.first("error", since=0, timeout=service.timing.quiet)
        spoken = await socket.speak(HELLO)
    answered = "ignored" if answer is None else described(answer)
    found = f"{answered}; next utterance: {spoken.outcome}"
    return Answer(_verdict(_is_heard(spoken)), found)


async def _bad_voice(service: Service) -> Answer:
    return await _refusal(service, voice="no-such-voice", api_key=None)


async def _bad_key(service: Service) -> Answer:
    return await _refusal(service, voice=VOICE, api_key="no-such-key")


async def _refusal(service: Service, *, voice: str, api_key: str | None) -> Answer:
    try:
        async with await service.dial(voice=voice, api_key=api_key) as socket:
            error = await socket.first("error", since=0, timeout=service.timing.settle)
            end = "accepted" if socket.end is None else socket.why_silent()
            return Answer(Verdict.OTHERWISE, described(error) if error is not None else end)
    except RefusedError as error:
        return Answer(_verdict(error.status in (400, 401, 403, 404)), str(error))


def _is_heard(spoken: Spoken) -> bool:
    return spoken.is_done and spoken.audio > 0


def _verdict(as_supposed: bool) -> Verdict:
    return Verdict.AS_SUPPOSED if as_supposed else Verdict.OTHERWISE


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def _in_ms(**seconds: float) -> dict[str, float]:
    return {f"{name}_ms": round(value * 1e3, 1) for name, value in seconds.items()}


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


QUICK = (
    Question(
        name="handshake",
        supposed="A handshake takes longer than a message and its answer on an open connection.",
        if_so="A warm connection saves a turn the handshake.",
        if_not="A warm connection saves nothing: you do not need the patch.",
        seconds=2,
        ask=_handshake,
    ),
    Question(
        name="first audio",
        supposed="Speech begins sooner on an open connection than with a handshake before it.",
        if_so="The pool keeps a connection open for each voice in use.",
        if_not="A warm connection saves nothing: you do not need the patch.",
        characters=2 * SAMPLES * len(HELLO),
        seconds=6,
        ask=_first_audio,
    ),
    Question(
        name="second utterance",
        supposed="After `audio.done` the same connection speaks another utterance.",
        if_so="The pool uses a connection again, until it is `max_age` old.",
        if_not="Each turn is replayed over a new connection: set `XAI_POOL_PATCH=off`.",
        characters=2 * len(HELLO),
        seconds=2,
        ask=_second_utterance,
    ),
    Question(
        name="PING",
        supposed="The service answers PINGs.",
        if_so="The heartbeat finds a vanished server within 1.5 times its interval.",
        if_not="Silence tells the pool nothing, so it ends no connection for want of a PONG. Only"
        " `answer_timeout` finds a vanished server.",
        seconds=1,
        ask=_ping,
    ),
    Question(
        name="fence",
        supposed="A PONG comes before the audio of a text that was sent after the PING.",
        if_so="Audio that comes before the PONG on a reused connection may be old, so the pool"
        " replays the utterance over a new connection.",
        if_not="The pool stops telling old audio from new by PONGs, so nothing would check a"
        " cancel.",
        options=("interruption",),
        characters=SAMPLES * len(HELLO),
        seconds=3,
        ask=_fence,
    ),
    Question(
        name="clear, speaking",
        supposed="`text.clear` ends an utterance: it is acknowledged within a second at most, and"
        " no audio follows.",
        if_so='`interruption="clear"` saves the connection of an interrupted utterance.',
        if_not='An interrupted utterance costs its connection: `interruption="discard"`.',
        options=("interruption",),
        characters=len(LONG) + len(HELLO),
        seconds=5,
        ask=_clear_speaking,
    ),
    Question(
        name="no words",
        supposed="A text that is empty, blank or “…” has an answer: `audio.done`, silence or an"
        " error.",
        if_so="Each of these ends the utterance.",
        if_not="Such a text fails after `answer_timeout`, and LiveKit retries it.",
        characters=sum(map(len, UNSPOKEN.values())),
        seconds=4,
        ask=_wordless,
    ),
    Question(
        name="after audio.done",
        supposed="Nothing comes after `audio.done`.",
        if_so="`audio.done` makes a connection reusable.",
        if_not="The pool discards a connection on which audio comes late. It detects late audio"
        " while the connection is idle, and by the PONG of the next utterance.",
        characters=len(HELLO),
        seconds=4,
        ask=_after_done,
    ),
    Question(
        name="gap in a text",
        supposed="The service waits for the rest of a text.",
        if_so="An LLM may pause in the middle of a sentence.",
        if_not="An LLM that pauses so long loses the utterance, with the patch and without it.",
        characters=sum(map(len, PIECES)),
        seconds=12,
        ask=_text_gap,
    ),
    Question(
        name="unknown message",
        supposed="An unknown message does not end the connection.",
        if_so="A service without `text.clear` costs the pool two connections at most; then the pool"
        " stops using it.",
        if_not="A service without `text.clear` ends such a connection. That costs as much as"
        ' `interruption="discard"`.',
        characters=len(HELLO),
        seconds=4,
        ask=_unknown_message,
    ),
    Question(
        name="bad voice",
        supposed="The service refuses an unknown voice before the upgrade, with 400 or 404.",
        if_so="It costs one dial, and the application gets an APIStatusError.",
        if_not="The pool takes it for a failure that may pass, and dials again.",
        seconds=1,
        ask=_bad_voice,
    ),
    Question(
        name="bad key",
        supposed="The service refuses a wrong key before the upgrade, with 401 or another 4xx.",
        if_so="It costs one dial, and the application gets an APIStatusError.",
        if_not="The pool takes it for a failure that may pass, and dials again.",
        seconds=1,
        ask=_bad_key,
    ),
)
"""In the order in which they are asked."""

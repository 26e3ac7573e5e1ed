"""An agent for a LiveKit worker. It speaks over warm connections from its first word on.

`python agent.py dev` runs it, with LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET and XAI_API_KEY
in the environment.
"""

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, cli
from livekit.plugins import xai

import xai_pool_patch

# At the top of the module, so that every job process gets it; before or after the plugin's import.
xai_pool_patch.install()

server = AgentServer()


class Assistant(Agent):
    def __init__(self) -> None:
        super().__init__(instructions="You help people on the phone, in one or two sentences.")

    async def on_enter(self) -> None:
        self.session.say("Hello, how can I help you?")


@server.rtc_session()
async def entrypoint(job: JobContext) -> None:
    tts = xai.TTS(voice="ara")
    # Dials while the room connects, so that the greeting finds its connection. What
    # AgentSession.start() prewarms would come milliseconds before it, too late for a handshake.
    tts.prewarm()
    session: AgentSession[None] = AgentSession(
        stt="deepgram/nova-3",  # any STT and LLM will do; these come with the LiveKit key
        llm="openai/gpt-4.1-mini",
        tts=tts,
    )
    await job.connect()
    await session.start(Assistant(), room=job.room)


if __name__ == "__main__":
    cli.run_app(server)

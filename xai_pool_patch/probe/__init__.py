"""What `xai-pool-patch probe` does: it asks the live service what the patch assumes of it.

- `service`: dials xAI and notes everything that comes; speaks the protocol without the plugin
- `question`: what a question and its answer are
- `quick`: the questions that are asked by default
- `by_name`: the questions that take long, or sessions
- `run`: asks one question after the other
- `report`: the announcement, a table, JSON and a file to attach to an issue

The questions are data. `docs/live-service.md` has a row for each, which a test checks. A user runs
the command and imports nothing from here. All of it may change.
"""

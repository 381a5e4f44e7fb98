"""``promptshard chat``: answers in a dialogue, streamed over a socket.

The command line (``launch/chat_command.py``) reads what the user types and prints answers. It
starts this program on every rank, with one end of a socket as standard input. ``messages`` defines
the lines that go through the socket; ``program`` answers them on rank 0, and the other ranks follow
in lockstep. When the socket is closed, all ranks end.
"""

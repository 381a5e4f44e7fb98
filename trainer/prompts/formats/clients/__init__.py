"""Scripts that ``promptshard export`` copies into exported folders.

They run without promptshard, beside the files of the export. ``prompt_stream`` is copied with every
other script, which imports it from its own folder.
"""

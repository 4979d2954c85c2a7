"""Where checkpoints are read from besides local files: hubs, object stores, web servers and archives.

``locate`` turns what a user named into a local path. The files of a remote source are attached as a folder of stand-ins
(``gemma2tool.storage.attached``); their bytes are fetched by range when a reader asks for them.
"""

"""Verifications as files for others to read: JUnit XML, Markdown, a page of HTML. Text from checkpoints is escaped in all of them."""

"""Reports of a verification: terminal output, JUnit XML, Markdown, an HTML page. All of them escape text from
checkpoints."""

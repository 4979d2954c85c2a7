"""Every finding that a scan can have: its id, severity, meaning, what an attacker gains, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2tool.pipeline.scan.finding import ScanFinding, Severity


@dataclass(frozen=True)
class ScanEntry:
    """A row of the catalog. ``meaning`` is for the documentation; ``gain`` and ``remedy`` follow every finding."""

    id: str
    severity: Severity
    meaning: str
    gain: str
    remedy: str


_CODE = "code of the author's choice runs when the file is loaded"
_TENSORS = "use the safetensors of the model, or convert the tensors with gemma2tool, which does not unpickle"
_MISLEAD = "text looks otherwise than programs read it, or controls the terminal that shows it"
_SILENT = "the model that runs is not the one in the files that were checked"

_ROWS: tuple[tuple[str, Severity, str, str, str], ...] = (
    # -- pickles
    ("pickle.code", "danger", "a pickle names a function or a class that no tensor needs", _CODE, _TENSORS),
    ("pickle.computed", "danger", "a pickle computes the name of what it imports", _CODE, _TENSORS),
    ("pickle.objects", "odd", "a pickle builds objects of known libraries beside tensors, such as training arguments",
     "code of these libraries runs when the file is loaded without weights_only",
     "leave the file out, unless training is to be continued"),
    ("pickle.nested", "odd", "a pickle holds another one as bytes or as text, which names what no tensor needs",
     "scanners do not see it; code runs when something unpickles the bytes", _TENSORS),
    ("pickle.damaged", "odd", "a pickle ends early or has opcodes that there are not",
     "what precedes the damage is executed, and scanners may stop at it", "download the file again"),
    ("pickle.too-long", "odd", "a pickle has more opcodes than were followed", "what follows was not looked at",
     _TENSORS),
    ("torch.program", "odd", "a TorchScript archive: a program, not a checkpoint",
     "the program runs when the file is loaded with torch.jit.load", _TENSORS),
    ("yaml.python", "danger", "a YAML file builds Python objects", _CODE, "read it with a safe loader only"),
    # -- archives
    ("archive.escape", "danger", "a member of an archive would be unpacked outside its folder",
     "files of the person who unpacks it are overwritten", "do not unpack it"),
    ("archive.bomb", "danger", "an archive would unpack to far more bytes than it has",
     "disk or memory of the machine that loads it is used up", "do not unpack it"),
    ("archive.damaged", "odd", "an archive contradicts itself or cannot be read",
     "programs that read it in different ways see different files", "download the file again"),
    ("archive.too-many", "odd", "an archive has more members than were looked at", "what follows was not looked at",
     "unpack it, then scan the folder"),
    ("archive.unread", "note", "an archive, or an encrypted member of one, that was not looked into", "",
     "unpack it, then scan the folder"),
    # -- Keras
    ("keras.lambda", "danger", "a Keras model has a Lambda layer, which holds Python code", _CODE,
     "use the weights alone, with the architecture of keras-hub"),
    ("keras.foreign", "danger", "a Keras model names a class or function outside of Keras",
     "a module of the author's choice is imported when the model is loaded", "use the weights alone"),
    ("hdf5.external", "danger", "an HDF5 file takes values or links from other files",
     "files of the person who loads it are read into the model", "do not load it"),
    # -- chat templates
    ("template.internals", "danger", "the chat template reaches for Python's internals",
     "code runs on every machine that renders the template without a sandbox",
     "use the chat template of the base model"),
    ("template.import", "danger", "the chat template imports or includes another template",
     "a file of the machine that renders it is read", "use the chat template of the base model"),
    ("template.endless", "danger", "the chat template takes more time or memory than any conversation needs",
     "a server that renders it stops answering", "use the chat template of the base model"),
    ("template.trigger", "odd", "the chat template does something else when a message holds a certain text",
     "the model gets instructions that the user does not see", "read the template, or use that of the base model"),
    ("template.markup", "odd", "the chat template writes a script, a link or an image into the text",
     "a page that shows the text loads what the author chose", "use the chat template of the base model"),
    ("template.syntax", "odd", "the chat template is not valid Jinja", "", "use the chat template of the base model"),
    # -- text
    ("text.control", "odd", "a control character in a name, a template or a key",
     "escape sequences move the cursor, forge lines or hide text in a terminal", "remove the character"),
    ("text.bidirectional", "odd", "a character that turns the direction of text", _MISLEAD, "remove the character"),
    ("text.invisible", "odd", "a character that is not visible: of zero width, or a tag", _MISLEAD,
     "remove the character"),
    ("text.workflow", "odd", "text that GitHub's runner takes for a command",
     "a log that shows it masks, sets or stops what the author chose", "remove the text"),
    # -- files
    ("code.remote", "odd", "Python files or classes that loaders run or import when they are told to trust the model",
     "code of the author's choice runs with trust_remote_code", "read the files, or load the model without them"),
    ("code.python", "note", "Python files beside the weights that no config names", "",
     "read them before running them"),
    ("code.binary", "odd", "a program or library beside the weights", "whoever starts it runs the author's code",
     "remove it"),
    ("code.import", "odd", "a config names a module of no known library, which a library imports by its name",
     "a module of the author's choice, or of the folder, runs when the model is loaded", "remove the key"),
    ("code.startup", "odd", "a file that Python runs when it starts, or imports in place of a library",
     "code of the author's choice runs when Python is started in the folder, or with it in its path",
     "remove the file, or start Python elsewhere"),
    ("code.editor", "odd", "a file that an editor, a debugger or a coding assistant acts on where it is opened",
     "commands of the author's choice run when the folder is opened or debugged in", "read it, or remove it"),
    ("code.packages", "odd", "requirements from another place than the public indexes",
     "code of the author's choice runs when they are installed", "install them from the public index"),
    ("git.program", "danger", "a setting of a git repository names a program, a command or other settings",
     "the program runs when git is used in the folder, as a shell's prompt and editors do",
     "remove the repository's folder, or clone it again"),
    ("git.hook", "danger", "a git repository has a hook that git-lfs did not install",
     "the hook runs when git is used in the folder", "remove it, unless it is yours"),
    ("git.attributes", "odd", "a .gitattributes names a filter other than git-lfs's",
     "where the user's settings have a filter of this name, its program runs on the files", "remove the line"),
    ("files.elsewhere", "note", "a file says that the model, or a part of it, comes from elsewhere", _SILENT,
     "put in what is meant"),
    ("files.shortcut", "odd", "a shortcut of a desktop",
     "it starts what the author chose, or tells another machine who looks at the folder", "remove it"),
    ("files.loaded-too", "odd", "a loader acts on a file that the format's reader does not use", _SILENT,
     "move the file out of the folder, or merge it"),
    ("files.ambiguous", "odd", "a file has a key or a name twice",
     "programs that take the first and those that take the last see different values", "remove one of the two"),
    ("files.escape", "danger", "an index, a link or a Modelfile leads out of the folder",
     "files of the person who loads it are read, or copied into an output", "do not load it"),
    ("files.pointer", "note", "a Git LFS pointer in place of the file", "", "run 'git lfs pull'"),
    ("files.unread", "note", "a file that its own reader refuses", "", "see the message"),
)  # fmt: skip

CATALOG = {row[0]: ScanEntry(*row) for row in _ROWS}
"""By id, in the order of the documentation."""


@dataclass(frozen=True)
class Place:
    """The file and the part of it that is being looked at; makes findings there."""

    file: str
    where: str = ""

    def part(self, name: str) -> Place:
        """A part of this place: a member of an archive, a key."""
        return Place(self.file, f"{self.where}: {name}" if self.where else name)

    def finding(
        self, id: str, message: str, *, line: int | None = None, severity: Severity | None = None, remedy: str = ""
    ) -> ScanFinding:
        """A finding here, with what its entry says unless something else is given."""
        entry = CATALOG[id]
        return ScanFinding(
            id, severity or entry.severity, self.file, self.where, line, message, entry.gain, remedy or entry.remedy
        )

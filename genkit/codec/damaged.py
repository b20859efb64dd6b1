"""What is wrong with a file of codes."""

from genkit.errors import GenkitError


class DamagedError(GenkitError):
    """The end of a sentence that begins with the file's name, which whoever knows it puts in front."""

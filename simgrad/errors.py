"""What went wrong with what the user gave, as opposed to what went wrong in simgrad."""


class InputError(ValueError):
    """Something that was given cannot be used; the message names it and says what to do.

    The command line shows it as one line. Any error that is raised inside a computation is
    simgrad's own, whatever its type, and is shown with its traceback.
    """

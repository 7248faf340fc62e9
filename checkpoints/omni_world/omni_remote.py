"""What transformers runs of this checkpoint with trust_remote_code=True: the import of its package."""

try:
    import omni

    omni.OmniProcessor  # noqa: B018 - the package of this name on PyPI is another project's, and has none
except (ImportError, AttributeError) as error:
    raise ImportError(
        "This checkpoint needs the package omni-thinker, which is imported as `omni` (the `omni` on PyPI is another "
        "project): pip install omni-thinker"
    ) from error


def __getattr__(name):
    return getattr(omni, name)

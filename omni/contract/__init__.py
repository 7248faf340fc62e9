"""The contract of a plug-in, as checks that its author runs: `omni check-plugin PACKAGE`.

    (plugin,) = find("omni-wave")
    for finding in examine(Subject(plugin)):
        print(finding.check, finding.result, finding.sentence)

The bundle is tried alone, then its encoder, then a small fused model of random weights with that encoder, and at last every
door of omni with this model. A check is one function, which raises `BrokenError` with a sentence that says what to mend.
"""

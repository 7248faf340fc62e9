"""The contract of a plug-in, as checks for its author: `omni check-plugin PACKAGE`.

    (plugin,) = find("omni-wave")
    for finding in examine(Subject(plugin)):
        print(finding.check, finding.result, finding.sentence)

The checks try the bundle alone, then its encoder, then a small fused model with random weights and this encoder, and finally
every command of omni with this model. A check is one function. It raises `BrokenError`, whose sentence says what to fix.
"""

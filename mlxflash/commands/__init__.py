"""What each verb of the command line does: `add` names its options, `run` carries it out."""

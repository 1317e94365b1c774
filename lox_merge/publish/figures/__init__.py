"""Pictures: functions from documents to matplotlib figures, for --plot, for reports and for papers alike."""

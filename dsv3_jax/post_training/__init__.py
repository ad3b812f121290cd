"""Post-training (chapter 5 of the report): tasks with checkable answers, rewards, and rejection sampling."""

"""The state that training changes, and the step that changes it."""

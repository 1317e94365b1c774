"""What leaves the house for people: pictures, reports."""

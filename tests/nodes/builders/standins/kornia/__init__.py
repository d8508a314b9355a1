from missing_package import stand_in_for

stand_in_for(__name__)

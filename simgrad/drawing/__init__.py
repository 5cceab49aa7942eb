"""What every figure is drawn with: sizes, colours, panels, sliders."""
